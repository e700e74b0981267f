"""Privacy-utility curves: a resumable sweep over methods and epsilons, and what all of it together costs.

``settings`` and ``entries`` say what is asked, ``fits`` whether the model takes it, ``cells`` is the grid, ``folder``
keeps it on disk, ``work`` and ``pool`` run cells, ``sweep`` runs them in order; ``table``, ``composed``, ``words``,
``plot`` and ``page`` say what came out.
"""
