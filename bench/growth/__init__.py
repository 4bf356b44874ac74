"""How does the cost of everything around a compiled step grow with its size?

Each row also measures other libraries with the same work.
"""
