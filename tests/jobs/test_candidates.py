"""Candidates of words: against transformers one gap at a time, and against a loop over cosines."""

import dataclasses

import numpy as np
import pytest
from augmenting import CONFIG, PIECES, SEVERAL, SINGLE, VOCAB, make_model, make_texts, make_tokenizer

from compactlm_jax.config import EncoderConfig
from compactlm_jax.data.augment import find_words
from compactlm_jax.data.vectors import WordVectors, normalized
from compactlm_jax.errors import ConfigError
from compactlm_jax.interop.bundle import save_pretrained
from compactlm_jax.interop.pretrained import save_pretraining
from compactlm_jax.jobs.candidates import CONTEXTS, Finder, gap_rows, load_masked_model


@pytest.fixture(scope='module')
def tokenizer(tmp_path_factory):
  return make_tokenizer(tmp_path_factory.mktemp('tokenizer'))


@pytest.fixture(scope='module')
def finder():
  return Finder.of(make_model(), count=6, batch_size=16)


@pytest.mark.torch
@pytest.mark.parametrize('context', CONTEXTS)
def test_guesses_are_those_of_transformers_one_gap_at_a_time(context, tokenizer, tmp_path):
  """As the original: the text with the gap, then the text. Mutations: read the position behind the gap; put the second
  text into segment 0; hide the word in both texts."""
  torch = pytest.importorskip('torch')
  transformers = pytest.importorskip('transformers')
  save_pretrained(make_model(), tmp_path)
  model = transformers.BertForMaskedLM.from_pretrained(tmp_path).eval()
  texts = find_words(make_texts(6, longest=7), tokenizer)
  found = Finder.of(make_model(), count=6, batch_size=16, context=context).find(texts)
  assert sum(len(text.words) for text in texts) > 12
  for text, own in zip(texts, found, strict=True):
    for word, candidates in zip(text.words, own, strict=True):
      if word.pieces > 1:
        continue
      tokens = ['[CLS]', *(VOCAB[i] for i in text.ids), '[SEP]']
      tokens[1 + word.piece] = '[MASK]'
      segments = [0] * len(tokens)
      if context == 'published':
        second = [*(VOCAB[i] for i in text.ids), '[SEP]']
        tokens, segments = [*tokens, *second], [*segments, *[1] * len(second)]
      ids = torch.tensor([[VOCAB.index(token) for token in tokens]])
      with torch.inference_mode():
        logits = model(input_ids=ids, token_type_ids=torch.tensor([segments])).logits
      best = logits[0, 1 + word.piece].topk(6).indices.tolist()
      assert candidates == tuple(VOCAB[i] for i in best if i > 4 and not VOCAB[i].startswith('##'))


def test_candidates_depend_on_no_other_text_and_no_batch_size(finder, tokenizer):
  """Mutation: give the outputs back in the order of length."""
  texts = find_words(make_texts(10), tokenizer)
  together = finder.find(texts)
  assert together == [finder.find([text])[0] for text in texts]
  assert together == Finder.of(make_model(), count=6, batch_size=64).find(texts)
  assert len({own for text in together for own in text}) > 10
  assert finder.find([]) == [] and finder.find(find_words(['the .'], tokenizer)) == [[]]


def test_neighbours_have_the_largest_cosines(tokenizer):
  """A NumPy loop; capitals are looked up as they are, then in lower case. Mutation: count the word itself."""
  rng = np.random.default_rng(3)
  words = [*SEVERAL[:3], *SINGLE, 'Birdcloud']
  vectors = normalized(words, rng.standard_normal((len(words), 5)).astype(np.float32))
  finder = Finder.of(make_model(), vectors, count=4)
  (text,) = find_words(['treehouse Riverstone Birdcloud roadrunner tree'], tokenizer)
  (found,) = finder.find([text])
  for name, own in zip(['treehouse', 'riverstone', 'Birdcloud'], found):
    cosines = {word: vectors.vectors_VE[words.index(word)] @ vectors.vectors_VE[words.index(name)] for word in words}
    assert own == tuple(sorted(set(words) - {name}, key=lambda word: -cosines[word])[:4])
  assert found[3] == ()  # no vector


def test_a_word_without_vectors_has_the_mean_of_its_pieces(tokenizer):
  """Among whole words of letters, its first piece aside. Mutations: take the first piece alone; keep it."""
  bundle = make_model()
  table = np.asarray(bundle.params['encoder']['embeddings']['word']['embedding'])
  (text,) = find_words(['Treehouse'], tokenizer)
  (found,) = Finder.of(bundle, count=5).find([text])
  query = (table[VOCAB.index('tree')] + table[VOCAB.index('##house')]) / 2
  whole = [word for word in VOCAB if word.isalpha() and word != 'tree']
  cosines = {word: table[VOCAB.index(word)] @ query / np.linalg.norm(table[VOCAB.index(word)]) for word in whole}
  assert found == [tuple(sorted(whole, key=lambda word: -cosines[word])[:5])]
  assert not set(PIECES) & set(whole)


@pytest.mark.parametrize('context', CONTEXTS)
@pytest.mark.parametrize('seq_len', [8, 13, 40])
def test_long_texts_are_cut_around_the_gap(context, seq_len, tokenizer):
  """Mutation: cut at the end."""
  texts = find_words([' '.join(np.random.default_rng(i).choice(SINGLE, 3 + 9 * i)) for i in range(4)], tokenizer)
  gaps = [(text, word) for text in texts for word in text.words]
  rows = gap_rows(gaps, tokenizer, seq_len, context)
  fetched = rows.fetch(np.arange(len(gaps)))
  for i, (text, word) in enumerate(gaps):
    row = fetched['input_ids'][i][: fetched['length'][i]].tolist()
    assert rows.lengths[i] == len(row) <= seq_len and row.count(tokenizer.mask_id) == 1
    place, stop = row.index(tokenizer.mask_id), row.index(tokenizer.sep_id)
    start = word.piece - (place - 1)
    first = [*text.ids]
    first[word.piece] = tokenizer.mask_id
    assert row[0] == tokenizer.cls_id and row[1:stop] == first[start : start + stop - 1]
    assert len(row[1:stop]) == min(len(first), seq_len - (3 if context == 'published' else 2))
    second = row[stop + 1 :]
    assert fetched['token_type_ids'][i].tolist() == [0] * (stop + 1) + [1] * len(second) + [0] * (seq_len - len(row))
    assert fetched['input_ids'][i][len(row) :].tolist() == [tokenizer.pad_id] * (seq_len - len(row))
    if context == 'published':
      assert second == [*text.ids[start : start + len(second) - 1], tokenizer.sep_id]
    else:
      assert not second


def test_a_generator_serves_and_other_models_do_not(tmp_path):
  """Mutation: take the discriminator's folder as it is."""
  bundle = make_model(dataclasses.replace(CONFIG, architecture='electra'))
  encoder = {'encoder': bundle.params['encoder']}
  rtd = {'dense': {'kernel': np.eye(16, dtype=np.float32), 'bias': np.zeros(16, np.float32)},
         'output': {'kernel': np.ones((16, 1), np.float32), 'bias': np.zeros(1, np.float32)}}  # fmt: skip
  discriminator = dataclasses.replace(bundle, params={**encoder, 'rtd_head': rtd})
  save_pretraining(discriminator, bundle, tmp_path / 'both')
  assert set(load_masked_model(str(tmp_path / 'both')).params) == {'encoder', 'mlm_head'}
  save_pretrained(discriminator, tmp_path / 'alone')
  with pytest.raises(ConfigError, match=r'has no head that guesses hidden words \(heads: rtd_head\); name a masked'):
    load_masked_model(str(tmp_path / 'alone'))


@pytest.mark.parametrize(
  ('options', 'message'),
  [
    ({'context': 'both'}, "--context: 'both'; use one of published, sentence"),
    ({'count': 0}, '--candidates: 0 must be between 1 and'),
    ({'count': 1000}, '--candidates: 1000 must be between 1 and'),
    ({'seq_len': 100}, 'seq_len: 100 must be between'),
  ],
)
def test_impossible_options_are_named(options, message):
  with pytest.raises(ConfigError, match=message):
    Finder.of(make_model(), **options)


def test_one_word_in_the_vectors_has_no_neighbour(tokenizer):
  """Mutation: ask for a neighbour all the same."""
  vectors = WordVectors(('treehouse',), np.ones((1, 1), np.float32))
  assert Finder.of(make_model(), vectors).find(find_words(['treehouse'], tokenizer)) == [[()]]


def test_a_model_without_segments_reads_its_own_type_alone(tokenizer):
  """Mutation: leave the type ids as they are."""
  config = dataclasses.replace(CONFIG, type_vocab_size=1)
  assert isinstance(config, EncoderConfig)
  single, double = make_model(config), make_model()
  types = np.repeat(np.asarray(single.params['encoder']['embeddings']['token_type']['embedding']), 2, axis=0)
  embeddings = {**single.params['encoder']['embeddings'], 'token_type': {'embedding': types}}
  encoder = {**single.params['encoder'], 'embeddings': embeddings}
  double = dataclasses.replace(double, params={**single.params, 'encoder': encoder})
  texts = find_words(make_texts(3), tokenizer)
  assert Finder.of(single, count=5).find(texts) == Finder.of(double, count=5).find(texts)
