# go.sh LIMIT: SSD in Gluon beside Triton, then the table of gradients with it
export PYTHONPATH=src PYTHONUNBUFFERED=1
timeout $1 python3 .carry/gl/m.py $(( $1 - 5 )) 2>&1 | grep -v -i warn | tail -70
