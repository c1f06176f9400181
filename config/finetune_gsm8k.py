"""
Fine-tuning on GSM8K with the published preset, from published weights or a run's, with the model's own tokenizer.

    python data.py config/gsm8k.py --tokenizer=sapientinc/HRM-Text-1B --dataset=gsm8k-hrm1b --block_size=4096
    python train.py config/finetune_gsm8k.py --init_from=sapientinc/HRM-Text-1B
"""

init_from = "sapientinc/HRM-Text-1B"  # or a run's out_dir, or a directory; the shape of the model comes from there
dataset = "gsm8k-hrm1b"
out_dir = "out-finetune"
block_size = 4096
batch_size = 8  # 32,768 tokens per step
micro_batch_size = 2
epochs = 5.0
learning_rate = 3e-5
warmup_iters = 0
bp_min = 5  # every step of training
ema = 0.999
eval_interval = 100
