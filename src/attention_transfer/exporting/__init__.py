"""How students leave a study: as a folder that timm opens, with a model card, as ONNX, on a hub."""
