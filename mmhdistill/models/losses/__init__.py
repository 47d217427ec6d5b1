from .feature_loss import FeatureLoss
from .masked_feature_loss import MaskedFeatureLoss
from .token_relation_loss import TokenRelationLoss

__all__ = ['FeatureLoss', 'MaskedFeatureLoss', 'TokenRelationLoss']
