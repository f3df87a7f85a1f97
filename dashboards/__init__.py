"""Interactive figures of traces, and the offline page that holds them. Installed as `memscope.dashboards`."""
