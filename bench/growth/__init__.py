"""How does the cost of everything around a compiled step grow with its size?

What do others take?
"""
