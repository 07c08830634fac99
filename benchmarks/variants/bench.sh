# bench.sh: the chosen kernels beside their peers
export PYTHONPATH=src:/tmp/site PYTHONUNBUFFERED=1
mkdir -p /tmp/peers && tar xJf .carry/peers/peers.tar.xz -C /tmp/peers && ln -sfn /tmp/peers peers
cp benchmarks/results/kernels-h100.json $OUT/kernels-h100.json
python3 benchmarks/variants/pick.py /tmp/ssd.json || exit 5
rm -rf ~/.triton/cache.none
date +%T
timeout 125 python3 -m tamba bench kernels --rows ssd_fwd/ --rows ssd_fwd_bwd/ --peers peers --limit-seconds 70 --rounds 8 --compile-seconds 35 --out $OUT/kernels-h100.json 2>&1 | tail -25
date +%T
timeout 80 python3 -m tamba bench cold-start --out $OUT/kernels-h100.json 2>&1 | tail -8
date +%T
timeout 75 python3 -m pytest -q -x -p no:cacheprovider -m gpu tests/test_kernels_directions.py tests/test_gpu.py tests/test_kernels_ssd.py 2>&1 | tail -8
