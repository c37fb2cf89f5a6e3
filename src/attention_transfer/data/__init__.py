"""Images, splits, training views and distribution shifts."""
