"""The teacher: a full-precision network together with a description of its input."""

from spdfq.teacher.teacher import Teacher, evaluation_mode, load_teacher

__all__ = ["Teacher", "evaluation_mode", "load_teacher"]
