"""An analysis as files: pictures, analysis.json and report.md, which lists them."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from compactlm_jax.analysis import plots
from compactlm_jax.analysis.components import Component
from compactlm_jax.analysis.concentration import RADIUS
from compactlm_jax.analysis.maps import Maps, cut_heads, matched_heads
from compactlm_jax.analysis.sparsity import Sparsity
from compactlm_jax.analysis.statistics import Findings, Heads, Model

FORMAT = 'compactlm-analysis'
INDEX, SUMMARY = 'analysis.json', 'report.md'

KEYS = {
  'format, version, complete': 'what wrote the file; complete is false while the pictures are being written',
  'models': "by role, 'model' and 'compare': name, path, architecture, sizes and number of parameters",
  'text': 'the file, rows and tokens read, rows that were cut (`cut_rows`) to seq_len, special tokens included',
  'concentration': 'by role: radius, `all`, `layers` [N] and `heads` [N][H] hold C (null: nothing beyond the radius); '
  'near, far and entropy [N][H] are means per query (near + far = 1; entropy in nats)',
  'layer_pairs': '`rows` and `columns` name the roles; attention_kl and value_kl [M][N] are KL(rows || columns) per '
  'query in nats, heads averaged first; cka [M + 1][N + 1] is linear CKA of hidden states, embeddings first',
  'components': 'by role, then by part (all its layers): parameters, flops (counted), xla_flops (by XLA; null where it '
  'does not say), milliseconds (median), for a batch of `rows` x `seq_len` tokens; encoder is all but the heads',
  'sparsity': "by role (null if no model has a zero in its encoder's matrices): density = nonzero / weights, by_matrix "
  '[N] and by_layer [N]; edges [K + 1] and counts [K] of the weights that are not zero, `beyond` of which are larger',
  'sentence': 'the line that is drawn and its tokens; by role: attention [N][H][T][T], values [N][T][T] (value '
  'relations, heads averaged), taps [N][H][T][W] (null: no convolution, or a tap beyond the sentence)',
  'pictures': 'file name: what it shows',
}
"""Keys of analysis.json. N layers of `model`, M of the second model, H heads, T tokens, W taps."""


@dataclasses.dataclass(frozen=True)
class Subject:
  """One of the analysed models.

  Attributes:
    role: 'model' or 'compare'.
    name: shown in pictures.
    path: where it was read.
    model: its encoder and configuration.
    components: what its parts cost.
    maps: what it does with the drawn sentence.
  """

  role: str
  name: str
  path: str
  model: Model
  components: Sequence[Component]
  maps: Maps


@dataclasses.dataclass(frozen=True)
class Analysis:
  """All that was found.

  Attributes:
    subjects: one model, or two.
    findings: of the text.
    text: what was read, for the files.
    line: number of the drawn sentence among the rows read, from 1.
    tokens: its tokens.
    timed: rows and tokens of the batch whose latency was measured.
    sparsity: by role what pruning left; empty if nothing was pruned.
  """

  subjects: tuple[Subject, ...]
  findings: Findings
  text: Mapping[str, Any]
  line: int
  tokens: tuple[str, ...]
  timed: tuple[int, int]
  sparsity: Mapping[str, Sparsity] = dataclasses.field(default_factory=dict)


def files_of(analysis: Analysis) -> dict[str, bytes]:
  """File name -> content, analysis.json last.

  Raises:
    ConfigError: matplotlib is not installed.
  """
  pictures = draw(analysis)
  captions = {name: caption for name, (_, caption) in pictures.items()}
  found = describe(analysis, captions)
  files = {name: png for name, (png, _) in pictures.items()}
  return {**files, SUMMARY: _summary(analysis, found).encode(), INDEX: as_json(found)}


def draw(analysis: Analysis) -> dict[str, tuple[bytes, str]]:
  """File name -> (PNG, what it shows in one sentence)."""
  pictures: dict[str, tuple[bytes, str]] = {}
  heads = (analysis.findings.heads, analysis.findings.other_heads)
  for subject, sums in zip(analysis.subjects, heads):
    pictures |= _draw_subject(subject, sums, analysis.tokens)
  pictures |= _draw_pairs(analysis) | _draw_cut(analysis) | _draw_sparsity(analysis)
  rows, length = analysis.timed
  title = f'Cost of the parts, a batch of {rows} x {length} tokens'
  pictures['components.png'] = (
    plots.cost_picture({s.name: s.components for s in analysis.subjects}, title),
    'Parameters, FLOPs (counted, and by XLA) and measured latency of each part, all layers together.',
  )
  return pictures


def _draw_subject(subject: Subject, sums: Heads, tokens: Sequence[str]) -> dict[str, tuple[bytes, str]]:
  name, role, maps = subject.name, subject.role, subject.maps
  title = f'{name}: diagonal concentration C per head (number), attention within {RADIUS} positions (colour)'
  pictures = {
    f'{role}_concentration.png': (
      plots.concentration_picture(np.asarray(sums.near_NH), np.asarray(sums.far_NH), RADIUS, title),
      f'How local each head of {name} is over the whole text: C is attention within {RADIUS} positions over attention '
      'beyond.',
    )
  }
  for layer, attention_HTT in enumerate(np.asarray(maps.attention_NHTT), 1):
    pictures[f'{role}_attention_layer_{layer:02d}.png'] = (
      plots.attention_picture(attention_HTT, tokens, f'{name}, layer {layer}: self-attention'),
      f'Self-attention of the heads of layer {layer} of {name} on one sentence.',
    )
  for layer, taps_HTW in enumerate([] if maps.taps_NHTW is None else np.asarray(maps.taps_NHTW), 1):
    causal = subject.model.config.causal
    pictures[f'{role}_convolution_layer_{layer:02d}.png'] = (
      plots.kernel_picture(taps_HTW, tokens, f'{name}, layer {layer}: kernels of the convolution', causal=causal),
      f'Kernels that the convolution heads of layer {layer} of {name} make at each position of the sentence.',
    )
  pictures[f'{role}_values.png'] = (
    plots.relation_picture(np.asarray(maps.values_NTT), tokens, f'{name}: value relations, heads averaged'),
    f'Value relations of each layer of {name} on the sentence: which tokens have similar values (MiniLM).',
  )
  return pictures


def _draw_pairs(analysis: Analysis) -> dict[str, tuple[bytes, str]]:
  first, second, found = analysis.subjects[0], analysis.subjects[-1], analysis.findings
  names, counts = (second.name, first.name), (second.model.config.num_layers, first.model.config.num_layers)
  rows, columns = ([str(i + 1) for i in range(n)] for n in counts)
  layers, states = (rows, columns), (['emb', *rows], ['emb', *columns])
  both = f'{names[0]} and {names[1]}' if len(analysis.subjects) > 1 else f'{names[0]} among themselves'
  kl = f'KL({names[0]} || {names[1]}), nats per query'
  return {
    'attention_kl.png': (
      plots.pair_picture(
        found.attention_kl_MN, layers, names, 'Self-attention of every two layers (heads averaged)', kl
      ),
      f'KL divergence of self-attention between every two layers of {both}; small is alike.',
    ),
    'value_kl.png': (
      plots.pair_picture(found.value_kl_MN, layers, names, 'Value relations of every two layers (heads averaged)', kl),
      f'KL divergence of value relations between every two layers of {both}; small is alike.',
    ),
    'cka.png': (
      plots.pair_picture(found.cka_MN, states, names, 'Hidden states of every two layers', 'linear CKA', (0.0, 1.0)),
      f'Linear CKA of hidden states between every two layers of {both}; 1 is alike up to rotation and scale.',
    ),
  }


def _draw_cut(analysis: Analysis) -> dict[str, tuple[bytes, str]]:
  """Each layer before and after heads were cut, where one model could be a sub-network of the other."""
  if len(analysis.subjects) < 2:
    return {}
  pictures: dict[str, tuple[bytes, str]] = {}
  for large, small in (analysis.subjects, analysis.subjects[::-1]):
    if not cut_heads(large.model.config, small.model.config):
      continue
    for match in matched_heads(large.maps, small.maps):
      before_HTT, after_gTT = (
        np.asarray(subject.maps.attention_NHTT[layer - 1])
        for subject, layer in ((large, match.layer), (small, match.small_layer))
      )
      title = f'Heads of layer {match.layer} of {large.name}, and of layer {match.small_layer} of {small.name}'
      pictures[f'cut_layer_{match.small_layer:02d}.png'] = (
        plots.cut_picture(before_HTT, after_gTT, match.overlap_gH, analysis.tokens, title),
        f'Self-attention of layer {match.layer} of {large.name} before heads were cut, of what is left of it in layer '
        f'{match.small_layer} of {small.name}, and the attention that every two of their heads have in common on this '
        'sentence: a head that is like several of them does what they did.',
      )
  return pictures


def _draw_sparsity(analysis: Analysis) -> dict[str, tuple[bytes, str]]:
  names = {s.role: s.name for s in analysis.subjects if s.role in analysis.sparsity}
  pictures: dict[str, tuple[bytes, str]] = {}
  for role, name in names.items():
    one = analysis.sparsity[role]
    percent = f'{100 * one.found["density"]:.2f} %'
    if one.found['nonzero'] < one.found['weights']:
      pictures[f'{role}_remaining.png'] = (
        plots.remaining_picture(one.by_matrix_NM, one.matrices, f'{name}: weights that are not zero, {percent} of all'),
        f'Share of the weights of {name} that remain, in each layer and matrix; {percent} in all.',
      )
  if names:
    counts = {name: analysis.sparsity[role].counts for role, name in names.items()}
    beyond = sum(one.beyond for one in analysis.sparsity.values())
    title = 'Values of the weights that are not zero' + (f' ({beyond:,} larger ones are not drawn)' if beyond else '')
    pictures['surviving_weights.png'] = (
      plots.survivors_picture(next(iter(analysis.sparsity.values())).edges, counts, title),
      f'Values of the weights that remain in {" and ".join(counts)}: magnitude pruning leaves none near zero, movement '
      'pruning does.',
    )
  return pictures


def describe(analysis: Analysis, captions: Mapping[str, str]) -> dict[str, Any]:
  """The object of analysis.json; see `KEYS`.

  Args:
    analysis: what was found.
    captions: picture -> what it shows.
  """
  subjects, found = analysis.subjects, analysis.findings
  rows, length = analysis.timed
  sentence: dict[str, Any] = {'line': analysis.line, 'tokens': list(analysis.tokens)}
  for subject in subjects:
    fields = {'attention': subject.maps.attention_NHTT, 'values': subject.maps.values_NTT}
    sentence[subject.role] = {name: _numbers(value, 4) for name, value in fields.items()}
    taps = subject.maps.taps_NHTW
    sentence[subject.role]['taps'] = None if taps is None else _numbers(taps, 4)
  return {
    'format': FORMAT,
    'version': 1,
    'complete': True,
    'models': {s.role: _model(s) for s in subjects},
    'text': dict(analysis.text),
    'concentration': {s.role: _concentration(h) for s, h in zip(subjects, (found.heads, found.other_heads))},
    'layer_pairs': {
      'rows': subjects[-1].role,
      'columns': subjects[0].role,
      'attention_kl': _numbers(found.attention_kl_MN, 6),
      'value_kl': _numbers(found.value_kl_MN, 6),
      'cka': _numbers(found.cka_MN, 6),
    },
    'components': {
      s.role: {'rows': rows, 'seq_len': length, 'parts': {c.name: _costs(c) for c in s.components}} for s in subjects
    },
    'sparsity': {role: _sparsity(one) for role, one in analysis.sparsity.items()} or None,
    'sentence': sentence,
    'pictures': dict(captions),
  }


def as_json(found: Mapping[str, Any]) -> bytes:
  """One key a line; strict JSON."""
  lines = [
    f'{json.dumps(key)}: {json.dumps(value, allow_nan=False, ensure_ascii=False)}' for key, value in found.items()
  ]
  return ('{\n' + ',\n'.join(lines) + '\n}\n').encode()


def _model(subject: Subject) -> dict[str, Any]:
  config = subject.model.config
  return {
    'name': subject.name,
    'path': subject.path,
    'architecture': config.architecture,
    'layers': config.num_layers,
    'heads': config.num_heads,
    'hidden_size': config.hidden_size,
    'parameters': sum(c.parameters for c in subject.components if c.name != 'encoder'),
  }


def _concentration(heads: Heads) -> dict[str, Any]:
  near_NH, far_NH = (np.asarray(x, np.float64) for x in (heads.near_NH, heads.far_NH))
  queries = (near_NH + far_NH)[0, 0]
  with np.errstate(divide='ignore'):
    return {
      'radius': RADIUS,
      'all': _numbers(near_NH.sum() / far_NH.sum(), 5),
      'layers': _numbers(near_NH.sum(1) / far_NH.sum(1), 5),
      'heads': _numbers(near_NH / far_NH, 5),
      'near': _numbers(near_NH / queries, 5),
      'far': _numbers(far_NH / queries, 5),
      'entropy': _numbers(np.asarray(heads.entropy_NH) / queries, 5),
    }


def _costs(component: Component) -> dict[str, Any]:
  return {name: value for name, value in dataclasses.asdict(component).items() if name != 'name'}


def _sparsity(one: Sparsity) -> dict[str, Any]:
  return {**one.found, 'edges': _numbers(one.edges, 8), 'counts': one.counts.tolist(), 'beyond': one.beyond}


def _numbers(values: Any, digits: int) -> Any:
  """Nested lists of rounded numbers; null for what JSON has no number for."""
  array = np.asarray(values, np.float64)
  rounded = np.round(array, digits).astype(object)
  return np.where(np.isfinite(array), rounded, np.full_like(rounded, None)).tolist()


def _summary(analysis: Analysis, found: Mapping[str, Any]) -> str:
  text, rows = found['text'], analysis.timed
  lines = ['# ' + ' and '.join(s.name for s in analysis.subjects), '']
  cut = f', {text["cut_rows"]:,} of them cut to {text["seq_len"]} tokens' if text['cut_rows'] else ''
  lines += [f'{text["rows"]:,} rows of {text["path"]}{cut}; {text["tokens"]:,} tokens.', '']
  for s in analysis.subjects:
    own, c = found['models'][s.role], found['concentration'][s.role]
    per_layer = ', '.join(_ratio(value) for value in c['layers'])
    lines += [
      f'- **{s.name}** ({s.role}, {s.path}): {own["architecture"]}, {own["layers"]} layers of {own["heads"]} '
      f'self-attention heads, {own["hidden_size"]} wide, {own["parameters"]:,} parameters. Diagonal concentration C = '
      f'{_ratio(c["all"])} (layers: {per_layer}).'
    ]
  lines += ['', f'## Cost of the parts, a batch of {rows[0]} x {rows[1]} tokens', '']
  lines += ['| Model | Part | Parameters | GFLOPs, counted | GFLOPs, by XLA | Milliseconds, median |']
  lines += ['|---|---|---|---|---|---|']
  for s in analysis.subjects:
    for c in s.components:
      xla = '–' if c.xla_flops is None else f'{c.xla_flops / 1e9:.3f}'
      costs = f'{c.parameters:,} | {c.flops / 1e9:.3f} | {xla} | {c.milliseconds:.2f}'
      lines += [f'| {s.name} | {c.name} | {costs} |']
  for s in (s for s in analysis.subjects if s.role in analysis.sparsity):
    own = analysis.sparsity[s.role].found
    share = f'{100 * own["density"]:.2f} %'
    lines += [
      '',
      f'Of the {own["weights"]:,} weights of {s.name} that can be masked {own["nonzero"]:,} remain ({share}).',
    ]
  drawn = f'Row {analysis.line} of the text is drawn: ' + ' '.join(f'`{token}`' for token in analysis.tokens)
  lines += ['', 'The encoder is all but the heads, timed as a whole.', '', '## Pictures', '', drawn, '']
  lines += [f'- [{name}]({name}): {caption}' for name, caption in found['pictures'].items()]
  lines += ['', f'## Keys of {INDEX}', '']
  lines += [f'- `{key}`: {meaning}' for key, meaning in KEYS.items()]
  return '\n'.join(lines) + '\n'


def _ratio(value: float | None) -> str:
  return '∞' if value is None else f'{value:.3f}'
