# bench.sh: SSD rows with peers, cold start, B13, whole models; GPU tests. KERNELS=gluon or auto
export PYTHONPATH=src:/tmp/site PYTHONUNBUFFERED=1 TAMBA_KERNELS=${KERNELS:-auto}
mkdir -p /tmp/peers && tar xJf .carry/peers/peers.tar.xz -C /tmp/peers && ln -sfn /tmp/peers peers
cp benchmarks/results/kernels-h100.json $OUT/kernels-h100.json
date +%T
timeout 125 python3 -m tamba bench kernels --rows ssd_fwd/ --rows ssd_fwd_bwd/ --peers peers --limit-seconds 70 --rounds 8 --compile-seconds 35 --out $OUT/kernels-h100.json 2>&1 | tail -25
date +%T
timeout 60 python3 -m tamba bench kernels --rows distill --limit-seconds 40 --out $OUT/distill-loss-h100.json 2>&1 | tail -6
timeout 80 python3 -m tamba bench cold-start --out $OUT/cold-start-h100.json 2>&1 | tail -8
date +%T
timeout 120 python3 -m tamba bench model --peers peers --limit-seconds 90 --out $OUT/model-h100.json 2>&1 | tail -12
date +%T
timeout 100 python3 -m pytest -q -x -p no:cacheprovider -m gpu tests/test_kernels_directions.py tests/test_gpu.py tests/test_kernels_ssd.py 2>&1 | tail -8
