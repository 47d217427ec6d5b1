from .feature_loss import FeatureLoss
from .token_relation_loss import TokenRelationLoss

__all__ = ['FeatureLoss', 'TokenRelationLoss']
