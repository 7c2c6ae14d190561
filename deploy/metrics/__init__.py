"""The numbers of a run, for the tools that people watch training with.

families     the Prometheus metrics, their names and units
exporter     fills them from the coordinator's snapshots
endpoint     serves them to Prometheus
history      writes them as Parquet
boards       writes them for TensorBoard and Weights & Biases
run          all of it beside a run
dashboard    the Grafana dashboard and the alert rules, as files in deploy/grafana and deploy/prometheus
"""
