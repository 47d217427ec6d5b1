from .redundant_token_masker import RedundantTokenMasker

__all__ = ['RedundantTokenMasker']
