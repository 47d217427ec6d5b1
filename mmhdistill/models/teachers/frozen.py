class FrozenTeachers(dict):
    """Named teachers outside the module tree: in no ``state_dict``, optimizer or DDP bucket.

    Copies of a model (EMA) share the teachers and leave them where they are: :attr:`owned` is False there.
    """

    owned = True

    def __deepcopy__(self, memo):
        shared = FrozenTeachers(self)
        shared.owned = False
        return shared
