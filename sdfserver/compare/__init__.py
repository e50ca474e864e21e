"""The networks that the literature sets against each other, fitted to one cloud in the same way and shown side by side.

networks -> trainer -> run -> page: interchangeable networks, one way to fit them, one run over all, one page of it. The
gallery fits the same networks to images and to an equation of waves.
"""
