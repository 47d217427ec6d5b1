from .cards import CARDS, TeacherCard, find_card
from .frozen import FrozenTeachers
from .vit_teacher import ViTTeacher

__all__ = ['CARDS', 'FrozenTeachers', 'TeacherCard', 'ViTTeacher', 'find_card']
