#!/bin/bash
# One job for each recipe, and in each job one process for each GPU of its node: torchrun shares the images, the
# reconstruction and the evaluation of a run among them. Submit it with:
# IMAGENET_VAL=/data/imagenet/val sbatch examples/slurm_torchrun.sh
#SBATCH --job-name=spdfq
#SBATCH --array=0-2
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --gpus-per-node=4
#SBATCH --time=04:00:00
set -euo pipefail

recipes=(paper/deit_s paper/vit_s paper/swin_s)
recipe=${recipes[$SLURM_ARRAY_TASK_ID]}

: "${IMAGENET_VAL:?set it to the folder of the validation images, with one subfolder for each class}"

# on a shared disk, so that jobs share finished stages; a job that was killed goes on when it is submitted again
export SPDFQ_STORE=${SPDFQ_STORE:-$PWD/runs/.store}

# --standalone picks a free port, so that several jobs can share a node
srun torchrun --standalone --nproc-per-node "${SLURM_GPUS_ON_NODE:-4}" -m spdfq run "$recipe" --out "runs/$recipe" \
  --set "evaluation.dataset.root=\"$IMAGENET_VAL\"" --quiet
