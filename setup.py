from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent


def requirements(name: str) -> list[str]:
    lines = (ROOT / 'requirements' / f'{name}.txt').read_text().splitlines()
    return [line for line in lines if line and not line.startswith('#')]


# mmhdistill/.mim holds links to configs/, tools/ and model-index.yml; a wheel carries them as files.
mim = [
    str(Path('.mim', folder, path.relative_to(ROOT / folder))) for folder in ('configs', 'tools')
    for path in sorted((ROOT / folder).rglob('*')) if path.suffix in ('.py', '.sh', '.yml')
]

setup(
    name='mmhdistill',
    version=(ROOT / 'mmhdistill' / 'version.py').read_text().split("'")[1],
    description='Hybrid distillation of Vision Transformers for OpenMMLab',
    long_description=(ROOT / 'README.md').read_text(encoding='utf-8'),
    long_description_content_type='text/markdown',
    license='Apache-2.0',
    python_requires='>=3.10',
    packages=find_packages(include=['mmhdistill', 'mmhdistill.*']),
    package_data={'mmhdistill': [*mim, '.mim/model-index.yml']},
    install_requires=requirements('runtime'),
    extras_require={
        name: requirements(name)
        for name in ('det', 'seg', 'teachers', 'tests', 'docs', 'quickstart', 'export')
    },
    zip_safe=False,
    classifiers=[
        'Development Status :: 3 - Alpha', 'License :: OSI Approved :: Apache Software License',
        'Programming Language :: Python :: 3', 'Topic :: Scientific/Engineering :: Artificial Intelligence'
    ])
