"""Finding features: tables, contrasts, attribution, ranking, causal analysis, dashboards, matching."""
