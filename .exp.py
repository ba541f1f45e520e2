import json, shutil, sys, dataclasses
from pathlib import Path
import torch
from tools.convert import main
from hysparse_megatron.checkpoint import store
from hysparse_megatron.checkpoint.state import load_state
from hysparse_megatron.config.frozen import load_frozen
from hysparse_megatron.data.sources import load_data, open_samples
from hysparse_megatron.data import evaluation_batches
from hysparse_megatron.runtime.process_groups import destroy_process_groups
from hysparse_megatron.training.state import build_state
from hysparse_megatron.training.step import evaluate
from tests.unit.single_process import default_group
A=Path("/tmp/adopt")
def make_llama():
    shutil.rmtree(A/"hf",ignore_errors=True); shutil.rmtree(A/"llama",ignore_errors=True)
    assert main(["export","--run-dir",str(A/"base"),str(A/"hf")])==0
    shutil.copytree(A/"hf",A/"llama")
    for p in (A/"llama").glob("*.py"): p.unlink()
    c=json.loads((A/"llama/config.json").read_text())
    l={k:c[k] for k in ("vocab_size","hidden_size","intermediate_size","num_attention_heads","num_key_value_heads","head_dim","rms_norm_eps","tie_word_embeddings","max_position_embeddings")}
    l|={"model_type":"llama","architectures":["LlamaForCausalLM"],"num_hidden_layers":8,"rope_theta":c["rope_theta"],"hidden_act":"silu","attention_bias":False,"mlp_bias":False}
    (A/"llama/config.json").write_text(json.dumps(l))
base=load_frozen(A/"base/config.yaml")
def eval_folder(folder, patch=None):
    c=load_frozen(folder/"config.yaml")
    c=dataclasses.replace(c, train=base.train, data=base.data, optim=base.optim)
    st=build_state(c, c.model.vocab_size, torch.device("cpu"))
    load_state(st, store.resolve_checkpoint(folder), weights_only=True)
    if patch: patch(st)
    corpus=load_data(c.data, c.train.seed)
    held=open_samples(corpus,"validation",c.train.seq_length)
    ev=evaluation_batches(held,num_batches=8,global_batch_size=16,micro_batch_size=16,data_parallel_size=1,data_parallel_rank=0,document_mask=False)

    loss=evaluate(st, (list(ev.microbatches(i)) for i in range(ev.num_batches)))
    destroy_process_groups()
    return loss
if __name__=="__main__":
  with default_group():
    make_llama()
    L="F 3*S F 2*S F"
    def ad(name, layout, *o):
        shutil.rmtree(A/name,ignore_errors=True)
        assert main(["adopt",str(A/"llama"),str(A/name),"--layout",layout,"--window","64","--block-size","16","--num-selected","8",*o])==0
        return A/name
    print("all F", eval_folder(ad("f","8*F")))
    print("W", eval_folder(ad("w","F 3*W F 2*W F")))
    for s in (-10,0,1,2,3,4,6,8,12,30):
        f=ad(f"s{s}",L,"--sparse-sink",str(s))
        print("S sink",s, eval_folder(f), flush=True)
    def half(st):
        for n,p in st.chunks[0].module.named_parameters():
            if "linear_proj" in n and st.megatron.plan.layout.layers[int(n.split(".")[2])].kind.value=="S": p.data*=0.5
    for s in (0,4): print("not doubled, sink",s, eval_folder(A/f"s{s}", half))
    import math
