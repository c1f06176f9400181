"""
Fine-tuning on GSM8K with the published preset, from the averaged weights of a run whose tokenizer the data shares.

    python data.py config/gsm8k.py --tokenizer=out-hrm1b/tokenizer.tiktoken --dataset=gsm8k-hrm1b
    python train.py config/finetune_gsm8k.py --init_from=out-hrm1b --dataset=gsm8k-hrm1b
"""

init_from = "out-hrm1b"  # the shape of the model comes from there
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
