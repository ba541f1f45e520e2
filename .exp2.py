import sys; sys.argv=[""]
import importlib.util
spec=importlib.util.spec_from_file_location("e",".exp.py"); e=importlib.util.module_from_spec(spec); spec.loader.exec_module(e)
import shutil
from tests.unit.single_process import default_group
L="F 3*S F 2*S F"
with default_group():
    def ad(name, layout, w, b, k, *o):
        shutil.rmtree(e.A/name,ignore_errors=True)
        assert e.main(["adopt",str(e.A/"llama"),str(e.A/name),"--layout",layout,"--window",str(w),"--block-size",str(b),"--num-selected",str(k),*o])==0
        return e.A/name
    for w in (4,8,16):
        print("S",w,"W only", e.eval_folder(ad(f"x{w}w","F 3*W F 2*W F",w,8,4)), flush=True)
        for s in (0,2,4,6,30):
            print("S",w,"sink",s, e.eval_folder(ad(f"x{w}s{s}",L,w,8,4,"--sparse-sink",str(s))), flush=True)
