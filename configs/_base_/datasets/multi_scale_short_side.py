# Multi-scale training: short sides of 480 to 800.
short_sides = dict(type='RandomChoiceResize', scales=[(short, 1333) for short in range(480, 801, 32)], keep_ratio=True)
