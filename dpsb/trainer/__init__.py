"""Private training inside transformers' ``Trainer`` and TRL's ``SFTTrainer``: one class more, the loop of ``fit``.

``arguments`` holds what the user states, ``refusals`` what is refused or ignored and why, ``examples`` the way from a
data set to tokens, ``planning`` the plan, ``guard`` the checks against training that silently does nothing, ``files``
what is saved; ``surroundings`` and ``mixin`` put them into a Trainer. Names are loaded when they are used: nothing here
imports transformers' Trainer or TRL before somebody asks for ``DPTrainer`` or ``DPSFTTrainer``.
"""
