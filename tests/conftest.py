"""One thread for each library: on tensors as small as the tests', threads only wait for each other."""
import cv2
import torch

torch.set_num_threads(1)
cv2.setNumThreads(1)
