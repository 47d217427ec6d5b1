from .hybrid_distiller import HybridDistiller

__all__ = ['HybridDistiller']
