"""Evaluation: `run.evaluate` is the command `evaluate`; `caption`, `vqa`, `retrieval` and `pointing` are its tasks.

These modules use trained runs (`Captioner`, `Matcher`). The metrics, and the measurements during training
(`validation`, `health`, `effective_rank`), depend on models and data only, so that training can import them.
"""
