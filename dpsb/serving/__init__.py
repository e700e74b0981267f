"""After training: many tenants' cores on one basis, sums of adapters, and adapters in the form a server takes.

``pack`` keeps one basis and r*r floats a layer for each tenant and gives plain adapters back, ``tenants`` switches
between them in one loaded model, ``combine`` adds adapters and their epsilons, ``vllm`` knows vLLM's rules.
"""
