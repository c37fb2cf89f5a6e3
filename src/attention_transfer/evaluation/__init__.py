"""What stored logits say: scores, detection, ensembles, and how sure the comparisons are.

Every number here is computed from logits on disk, without a model or a GPU. The modules are imported by
name; this file imports none, so that `statistics` can be used without torch.
"""
