"""A small HRM that learns grade-school word problems on a CPU in minutes: python train.py config/demo.py"""

dataset = "problems"  # embedded; made on the spot
final_eval = "problems"
device = "cpu"

max_iters = 1000
