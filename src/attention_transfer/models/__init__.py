"""Vision Transformers from timm, teachers, and reading and replacing attention."""
