"""How does the cost of everything around a compiled step grow with the size of the work, and what do others take?"""
