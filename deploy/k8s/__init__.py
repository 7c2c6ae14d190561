"""A run on Kubernetes: what `distrl k8s render` prints, and the Kustomize folder k8s/, both from the same objects.

values    what a cluster needs to know beside the run's config
pods      pod templates: security, volumes, probes, resources
network   who may talk to whom
objects   all objects of a run
folder    k8s/: base and overlays, written from the same objects
submit    applies them through the official client
"""
