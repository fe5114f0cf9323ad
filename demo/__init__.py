"""The example's upstream pipeline and model spec; delete it to bring your own."""
