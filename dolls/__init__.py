"""The paper-doll world: endless seeded stories of small people, things and scenes, drawn with NumPy alone.

The true look of everything is known, so scores.py measures exactly what a model remembers.
"""
