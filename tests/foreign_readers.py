"""The readers of `foreign`, each with small valid files."""

import functools
import hashlib
import json
import pathlib
import tempfile

import numpy as np
from etils import epath
from foreign import Files, Reader

from compactlm_jax.config import EncoderConfig, RunConfig, from_config_dict, to_json
from compactlm_jax.data.glue import read_glue
from compactlm_jax.data.manifest import Manifest, Shard, read_manifest, verify_files
from compactlm_jax.data.shards import write_info
from compactlm_jax.data.squad import read_squad
from compactlm_jax.data.table import read_table, tokenize_table
from compactlm_jax.data.text import open_text
from compactlm_jax.data.tokenizer import Tokenizer, load_tokenizer
from compactlm_jax.data.vectors import read_vectors
from compactlm_jax.data.windows import make_windows
from compactlm_jax.errors import CompactLMError
from compactlm_jax.interop.bundle import Bundle, export_files, from_pretrained
from compactlm_jax.interop.folder import INDEX, MANIFEST, WEIGHTS, open_folder
from compactlm_jax.interop.names import leaf_shapes
from compactlm_jax.interop.sparse import save_sparse
from compactlm_jax.interop.tokenizer_files import TokenizerFiles, read_tokenizer
from compactlm_jax.jobs.adapt_best import read_best
from compactlm_jax.jobs.finished import finished_results
from compactlm_jax.jobs.grid import scored_rows, seq_len_of
from compactlm_jax.metrics import read_metrics
from compactlm_jax.report.plot import points_of
from compactlm_jax.report.runs import collect
from compactlm_jax.train.rundir import open_run, read_run
from compactlm_jax.tree import nested

VOCABULARY = '[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\na\nb\n##c\n'
SPECIAL = {'pad_token': '[PAD]', 'unk_token': '[UNK]', 'cls_token': '[CLS]', 'sep_token': '[SEP]',
           'mask_token': {'content': '[MASK]', 'special': True}}  # fmt: skip
ENCODER = EncoderConfig(vocab_size=8, hidden_size=4, num_layers=2, num_heads=2, intermediate_size=8, max_positions=5)


def _files(folder: str | pathlib.Path) -> Files:
  root = pathlib.Path(folder)
  return {str(p.relative_to(root)): p.read_bytes() for p in sorted(root.rglob('*')) if p.is_file()}


def bundle(config: EncoderConfig = ENCODER, *, density: float = 1.0, classes: int = 2) -> Bundle:
  """A model of random weights, without compiling anything."""
  rng = np.random.default_rng(0)
  shapes = leaf_shapes(config, ('encoder', 'classifier'), classes)
  leaves = {n: rng.standard_normal(s).astype(np.float32) * (rng.random(s) < density) for n, s in shapes.items()}
  tokenizer = TokenizerFiles({'vocab.txt': VOCABULARY.encode(), 'tokenizer_config.json': json.dumps(SPECIAL).encode()})
  return Bundle(config, nested(leaves), tokenizer, tuple('xyz'[:classes]))


@functools.cache
def model() -> Files:
  """A folder of BERT with a classifier."""
  return export_files(bundle(), 'm')


def sharded() -> Files:
  """The same in two shards and their index."""
  import safetensors.numpy

  files = dict(model())
  tensors = safetensors.numpy.load(files.pop(WEIGHTS))
  names = [f'model-0000{i}-of-00002.safetensors' for i in (1, 2)]
  placed = {name: names[i % 2] for i, name in enumerate(sorted(tensors))}
  for shard in names:
    files[shard] = safetensors.numpy.save({n: t for n, t in tensors.items() if placed[n] == shard})
  return {**files, INDEX: json.dumps({'metadata': {'total_size': 1}, 'weight_map': placed}).encode()}


def convbert() -> Files:
  """A pruned ConvBERT whose layers differ, with the sizes in config.json."""
  config = EncoderConfig.mixed(heads=4, head_ratio=2, hidden_size=8, vocab_size=8, num_layers=2, max_positions=5,
                               intermediate_size=8, heads_per_layer=(2, 1), neurons_per_layer=(8, 0))  # fmt: skip
  return export_files(bundle(config), 'm')


def native() -> Files:
  """A sparse export in int8, without the manifest that would refuse every change."""
  with tempfile.TemporaryDirectory() as folder:
    save_sparse(bundle(density=0.2), f'{folder}/e', 'int8')
    return {name: data for name, data in _files(f'{folder}/e').items() if name != MANIFEST}


def sparse() -> Files:
  """A sparse export with gaps, columns and bit masks."""
  config = EncoderConfig(vocab_size=8, hidden_size=64, num_layers=1, num_heads=2, intermediate_size=64, max_positions=5)
  with tempfile.TemporaryDirectory() as folder:
    save_sparse(bundle(config, density=0.06), f'{folder}/e', 'float32')
    return {name: data for name, data in _files(f'{folder}/e').items() if name != MANIFEST}


def exported() -> Files:
  """A dense export with its manifest."""
  from compactlm_jax.interop.writing import write_export

  with tempfile.TemporaryDirectory() as folder:
    write_export(model(), f'{folder}/e')
    return _files(f'{folder}/e')


def tokenizer_json() -> Files:
  """A tokenizer folder as `compactlm tokenizer` writes it."""
  with tempfile.TemporaryDirectory() as folder:
    pathlib.Path(folder, 'vocab.txt').write_text(VOCABULARY)
    content = load_tokenizer(folder).backend.to_str()
  config = {'do_lower_case': True, 'strip_accents': None, 'tokenize_chinese_chars': True, **SPECIAL}
  return {
    'tokenizer.json': content.encode(),
    'tokenizer_config.json': json.dumps(config).encode(),
    'special_tokens_map.json': json.dumps(SPECIAL).encode(),
    'vocab.txt': VOCABULARY.encode(),
  }


def tokenizer_vocabulary() -> Files:
  """A folder with vocab.txt alone."""
  return {name: data for name, data in tokenizer_json().items() if name != 'tokenizer.json'}


def read_tokenizers(folder: pathlib.Path) -> None:
  """Both readers of a tokenizer folder."""
  found = read_tokenizer(open_folder(folder))
  if found is not None:
    found.vocab, found.pad_token_id  # noqa: B018 - computed on first use
  tokenizer = load_tokenizer(folder)
  tokenizer.encode(['a bc [SEP]', '', 'ä\0'])
  tokenizer.fingerprint()


def manifest() -> Files:
  """manifest.json of `prepare`, what TFDS is told, and two shards."""
  rows = b'rows'
  shards = tuple(Shard(f'rows-{i}', 3, len(rows), hashlib.sha256(rows).hexdigest()) for i in range(2))
  content = Manifest({'seq_len': 8, 'tokenizer': 'f' * 64, 'mode': 'documents', 'sources': [{'name': 'a', 'size': 3}]},
                     50, {'rows': 6, 'real_token_fraction': 0.5}, {'train': shards, 'validation': shards[:1]},
                     {'grain': '1'}, {'train': {'rows': 6, 'tokens': 40, 'words': 20}})  # fmt: skip
  with tempfile.TemporaryDirectory() as folder:
    write_info(epath.Path(folder), content.splits, content.seq_len, content.vocab_size)
    return {**_files(folder), 'manifest.json': content.dumps().encode(), 'rows-0': rows, 'rows-1': rows}


def read_prepared(folder: pathlib.Path) -> None:
  """What opening a dataset asks of a manifest."""
  found = read_manifest(folder)
  verify_files(folder, found, digests=True)
  for split in found.splits:
    found.rows(split), found.words_per_token(split)
  found.seq_len, found.fingerprint, found.dumps()


@functools.cache
def run() -> Files:
  """A finished run with a grid."""
  grid = [{'width': w, 'depth': 1.0, 'metrics': {'accuracy': 0.5}, 'params': 9, 'flops': 1.0, 'latency_ms': None}
          for w in (0.5, 1.0)]  # fmt: skip
  results = {'metrics': {'accuracy': 0.5, 'loss': 1.0}, 'task': 'adapt', 'steps': 10, 'seconds': 1.5, 'density': 0.5,
             'nonzero': 7, 'grid': grid}  # fmt: skip
  lines = [{'step': i, 'loss': 'NaN' if i == 2 else 0.5, 'device_hours': 0.1 * i} for i in range(1, 4)]
  with tempfile.TemporaryDirectory() as folder:
    with open_run(folder, RunConfig(task='adapt', steps=10), {'data': 'rows', 'tokenizer': 'words'}):
      pass
    record = pathlib.Path(folder, 'config.json').read_bytes()
  return {
    'config.json': record,
    'results.json': json.dumps(results).encode(),
    'best.json': json.dumps({'1x1': {'step': 5, 'value': 0.5}}).encode(),
    'metrics.jsonl': ''.join(json.dumps(line) + '\n' for line in lines).encode(),
  }


def read_a_run(folder: pathlib.Path) -> None:
  """Every reader of the records of a run; one that fails does not hide the others."""
  errors: list[CompactLMError] = []
  for read in (
    lambda: points_of(read_metrics(folder), 'loss'),
    lambda: read_best(folder),
    lambda: seq_len_of(str(folder)),
    lambda: scored_rows(str(folder)),
    lambda: finished_results(RunConfig(task='adapt', steps=10), str(folder)),
    lambda: read_run(folder),
    lambda: collect([str(folder)], read_run),
  ):
    try:
      read()
    except CompactLMError as e:
      errors.append(e)
  if errors:
    raise errors[-1]


def run_config() -> Files:
  """A configuration as JSON."""
  config = RunConfig(task='adapt', steps=10, encoder=ENCODER)
  return {'run.json': json.dumps(to_json(config)).encode()}


def read_config(folder: pathlib.Path) -> None:
  """JSON to dataclasses and back; text that is not JSON does not reach them."""
  try:
    value = json.loads((folder / 'run.json').read_bytes())
  except (ValueError, OSError, RecursionError):
    return
  found = from_config_dict(RunConfig, value)
  again = from_config_dict(RunConfig, to_json(found))
  assert again == found, (again, found)


@functools.cache
def _tokenizer() -> Tokenizer:
  with tempfile.TemporaryDirectory() as folder:
    pathlib.Path(folder, 'vocab.txt').write_text(VOCABULARY)
    return load_tokenizer(folder)


def _table(file: pathlib.Path, label: str = 'label', *, scores: bool = False) -> None:
  """A table up to its rows of tokens."""
  tokenize_table(read_table(file, ('text',), label, scores=scores), _tokenizer(), 8)


def _squad(file: pathlib.Path) -> None:
  """Questions up to their windows."""
  make_windows(read_squad(file), _tokenizer(), 16, doc_stride=4, max_query_length=4)


TSV = b'text\tlabel\tn\nso cold\tyes\t1\nwarm and light\tno\t0.5\n\xc3\xa4\tno\t-3\n'
JSONL = b'{"text": "so cold", "label": "yes", "n": 1}\n{"text": "warm", "label": 3, "n": 0.5}\n'
_QAS = [{'id': 'a', 'question': 'who?', 'answers': [{'text': 'he', 'answer_start': 4}], 'is_impossible': False},
        {'id': 'b', 'question': 'why?', 'answers': [], 'is_impossible': True}]  # fmt: skip
SQUAD = {'version': '2.0', 'data': [{'title': 'T', 'paragraphs': [{'context': 'was he here', 'qas': _QAS}]}]}
FLAT = [{'id': 1, 'question': 'who?', 'context': 'was he here', 'answer': 'he', 'answer_start': 4},
        {'id': 'b', 'question': 'q', 'context': 'c', 'answers': {'text': ['c'], 'answer_start': [0]}}]  # fmt: skip
GLUE = {
  'RTE/train.tsv': b'index\tsentence1\tsentence2\tlabel\n0\ta b\tc\tentailment\n1\td\te\tnot_entailment\n',
  'CoLA/train.tsv': b'gj04\t1\t\tOur friends.\ngj04\t0\t*\tOne more.\n',
  'STS-B/dev.tsv.gz': b'index\tsentence1\tsentence2\tscore\n0\ta\tb\t2.5\n1\tc\td\t5.0\n',
  'QQP/train.tsv': b'id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate\n1\t2\t3\ta?\tb?\t0\n4\t5\t6\tc?\td?\t1\n',
}


def read_benchmark(folder: pathlib.Path) -> None:
  """All tasks of the folder; one that cannot be read does not hide the others."""
  errors = []
  for task, split in (('rte', 'train'), ('cola', 'train'), ('stsb', 'dev'), ('qqp', 'train')):
    try:
      read_glue(task, folder, split)
    except CompactLMError as e:
      errors.append(e)
  if errors:
    raise errors[-1]


def read_text(folder: pathlib.Path) -> None:
  """Lines of corpora."""
  for source in open_text(f'{folder}/*.txt,{folder}/*.txt.gz'):
    for _ in source.lines(lambda _: None):
      pass


READERS = (
  Reader('model folder', model, from_pretrained),
  Reader('shards and index', sharded, from_pretrained),
  Reader('pruned ConvBERT folder', convbert, from_pretrained),
  Reader('sparse export', sparse, from_pretrained),
  Reader('sparse export int8', native, from_pretrained),
  Reader('export with manifest', exported, from_pretrained),
  Reader('tokenizer.json', tokenizer_json, read_tokenizers),
  Reader('vocab.txt', tokenizer_vocabulary, read_tokenizers),
  Reader('manifest of prepare', manifest, read_prepared),
  Reader('records of a run', run, read_a_run),
  Reader('configuration', run_config, read_config),
  Reader('table .tsv', lambda: {'t.tsv': TSV}, lambda f: _table(f / 't.tsv')),
  Reader('table .jsonl', lambda: {'t.jsonl': JSONL}, lambda f: _table(f / 't.jsonl')),
  Reader('table .jsonl.gz', lambda: {'t.jsonl.gz': JSONL},
         lambda f: _table(f / 't.jsonl.gz', 'n', scores=True)),
  Reader('SQuAD .json', lambda: {'s.json': json.dumps(SQUAD).encode()}, lambda f: _squad(f / 's.json')),
  Reader('SQuAD .json.gz', lambda: {'s.json.gz': json.dumps(SQUAD).encode()}, lambda f: _squad(f / 's.json.gz')),
  Reader('SQuAD .jsonl', lambda: {'s.jsonl': '\n'.join(map(json.dumps, FLAT)).encode()},
         lambda f: _squad(f / 's.jsonl')),
  Reader('GLUE folder', lambda: GLUE, read_benchmark),
  Reader('word vectors', lambda: {'v.txt': b'a 1 2 3\nb 0.5 -1 2\n<unk> 1 1 1\n'}, lambda f: read_vectors(f / 'v.txt')),
  Reader('text', lambda: {'a.txt': b'One line.\n\nAnother\n', 'b.txt.gz': b'One line.\n\nAnother\n'}, read_text),
)  # fmt: skip
"""Every reader of bytes that this library did not write, or that may be damaged since."""
