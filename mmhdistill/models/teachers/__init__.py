from .card import TeacherCard
from .cards import CARDS, find_card
from .frozen import FrozenTeachers
from .huggingface_teacher import HuggingFaceTeacher
from .receipt import Receipt
from .teacher import Teacher
from .timm_teacher import TimmTeacher
from .vit_teacher import ViTTeacher

__all__ = [
    'CARDS', 'FrozenTeachers', 'HuggingFaceTeacher', 'Receipt', 'Teacher', 'TeacherCard', 'TimmTeacher', 'ViTTeacher',
    'find_card'
]
