from .pyramids import DeconvPyramid, SimpleFPN

__all__ = ['DeconvPyramid', 'SimpleFPN']
