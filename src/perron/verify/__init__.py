"""Proofs about whole networks."""

from perron.verify.interval import ClassCertificate, Interval, certify_classes, propagate

__all__ = ["ClassCertificate", "Interval", "certify_classes", "propagate"]
