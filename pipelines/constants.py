"""What every renderer and its tests share: ImageNet's statistics, by which images are normalised."""

# Of pixel values in [0, 1], per channel (R, G, B).
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
