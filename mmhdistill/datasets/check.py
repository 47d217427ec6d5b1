"""List the files of a folder that cannot be used, before a run finds them.

    python -m mmhdistill.datasets.check FOLDER

Prints a line for each, ``class<TAB>path<TAB>detail``, and the totals on the error stream. Exit code: 0 where every
image can be used, 1 where one cannot, 2 where the folder cannot be read or holds no image.
"""
import argparse
import os
import sys
from collections import Counter
from collections.abc import Iterator
from multiprocessing.pool import ThreadPool

from .decode import CONVERTED, BadImage, read_image
from .image_folder import EXTENSIONS, PROBLEMS
from .listing import list_images, printable


def check(folder: str, workers: int = 1) -> Iterator[tuple[str, list[str], str]]:
    """(path, classes of problem, detail) of each path that is listed, in the order of :func:`list_images`.

    Classes are empty for an image that is taken as it is, one of ``SKIPPED``, with its detail, for one that cannot be
    used, else some of ``CONVERTED``.

    Args:
        workers: threads that decode.

    Raises:
        OSError: ``folder`` cannot be read.
    """
    names, problems = list_images(folder, EXTENSIONS)
    return _results([os.path.join(folder, name) for name in names], problems, workers)


def _results(paths: list[str], problems: list[tuple[str, str, str]], workers: int
             ) -> Iterator[tuple[str, list[str], str]]:
    for problem, path, detail in problems:
        yield path, [problem], f'{problem}: {detail}'
    with ThreadPool(workers) as pool:
        yield from pool.imap(_check_file, paths, chunksize=16)


def _check_file(path: str) -> tuple[str, list[str], str]:
    try:
        return path, read_image(path)[1], ''
    except BadImage as error:
        return path, [error.problem], str(error)


def main() -> int:
    parser = argparse.ArgumentParser(prog='python -m mmhdistill.datasets.check',
                                     description='List the images of a folder that cannot be used.')
    parser.add_argument('folder', help='searched with all that lies below')
    parser.add_argument('--workers', type=int, default=os.cpu_count(), help='threads that decode (default: one a core)')
    arguments = parser.parse_args()
    if arguments.workers < 1:
        parser.error(f'--workers {arguments.workers}: give at least 1 thread.')
    try:
        found = check(arguments.folder, arguments.workers)
    except OSError as error:
        parser.error(f"'{arguments.folder}' cannot be read: {error}. Give the folder of the images.")
    counts, total, bad = Counter(), 0, 0
    for path, problems, detail in found:
        total += 1
        counts.update(problems)
        if detail:
            bad += 1
            problem, _, rest = detail.partition(': ')
            print(problem, printable(path), ' '.join(rest.split()), sep='\t')
    if not total:
        parser.error(f"no image in '{arguments.folder}': expected files ending in {', '.join(EXTENSIONS)}.")
    for problem in PROBLEMS:
        if counts[problem]:
            print(f'{counts[problem]} {problem}: {CONVERTED.get(problem, "cannot be used")}', file=sys.stderr)
    print(f'{total} paths, of which {bad} cannot be used', file=sys.stderr)
    return int(bad > 0)


if __name__ == '__main__':
    sys.exit(main())
