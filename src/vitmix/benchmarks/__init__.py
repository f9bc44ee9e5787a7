"""``vitmix bench``: what mixing costs on this machine, side by side with what else one could run.

``measure`` runs variants in turns; ``steps``, ``saliency``, ``horizontal``, ``pixels`` and
``pipeline`` each make comparisons; ``baselines`` has the methods as their formulas are usually
coded; ``targets`` is what the ratios should be; ``page`` prints and writes.
"""
