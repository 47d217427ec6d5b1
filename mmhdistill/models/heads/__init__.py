from .projectors import LinearProjector, MLPProjector

__all__ = ['LinearProjector', 'MLPProjector']
