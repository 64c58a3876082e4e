"""Pure rules: values in, values out. No clock, no chance, no settings, no store."""
