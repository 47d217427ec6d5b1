class FrozenTeachers(dict):
    """Named teachers outside the module tree: in no ``state_dict``, optimizer or DDP bucket, shared by copies (EMA)."""

    def __copy__(self):
        return self

    def __deepcopy__(self, memo):
        return self
