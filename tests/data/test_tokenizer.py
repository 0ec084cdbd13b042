import contextlib
import json
import shutil
import subprocess
import sys

import pytest
import tokenizers
from killing import Kill
from tokenizers import models, normalizers, pre_tokenizers

from compactlm_jax.data import wordpiece
from compactlm_jax.data.augment import find_words
from compactlm_jax.data.tokenizer import SPECIAL_TOKENS, load_tokenizer
from compactlm_jax.data.wordpiece import train_wordpiece
from compactlm_jax.errors import ConfigError, DataError
from compactlm_jax.jobs.models import tokenizer_of

TEXTS = ['The cold RIVER runs, near a house!', 'Café déjà [SEP] [MASK] unheard-of', '', '日本 42']


def test_training_writes_the_same_bytes_in_every_process(corpus, vocabulary, tmp_path):
  code = 'import sys; from compactlm_jax.data.wordpiece import train_wordpiece as t; t(sys.argv[1], 120, sys.argv[2])'
  for run in range(3):
    folder = tmp_path / str(run)
    subprocess.run([sys.executable, '-c', code, str(corpus), str(folder)], check=True)
    names = sorted(p.name for p in folder.iterdir())
    assert names == ['special_tokens_map.json', 'tokenizer.json', 'tokenizer_config.json', 'vocab.txt']
    for name in names:
      assert (folder / name).read_bytes() == (vocabulary / name).read_bytes(), name


def test_trained_vocabulary(vocabulary):
  tokenizer = load_tokenizer(vocabulary)
  assert tokenizer.vocab_size <= 120
  assert (tokenizer.pad_id, tokenizer.unk_id, tokenizer.cls_id, tokenizer.sep_id, tokenizer.mask_id) == (0, 1, 2, 3, 4)
  tokens = (vocabulary / 'vocab.txt').read_text().split('\n')
  assert tuple(tokens[:5]) == SPECIAL_TOKENS and 'river' in tokens and 'river.' not in tokens
  assert 'cafe' in tokens  # lower case, accents stripped
  ids = tokenizer.encode(['the cold river'])[0]
  assert tokenizer.unk_id not in ids and tokenizer.backend.decode(ids) == 'the cold river'


def test_case_is_kept_on_request(corpus, tmp_path):
  tokenizer = train_wordpiece(str(corpus), 150, tmp_path / 't', lowercase=False)
  assert tokenizer.encode(['Café']) != tokenizer.encode(['cafe'])
  assert json.loads((tmp_path / 't' / 'tokenizer_config.json').read_text())['do_lower_case'] is False


def test_transformers_loads_it_and_agrees(vocabulary, tmp_path):
  transformers = pytest.importorskip('transformers')
  theirs = transformers.AutoTokenizer.from_pretrained(str(vocabulary))
  ours = load_tokenizer(vocabulary)
  plain = [t.replace('[SEP]', '').replace('[MASK]', '') for t in TEXTS]
  assert theirs(plain, add_special_tokens=False)['input_ids'] == ours.encode(plain)
  assert theirs.model_max_length == 512 and theirs.mask_token_id == ours.mask_id
  theirs.save_pretrained(str(tmp_path / 'again'))
  assert load_tokenizer(tmp_path / 'again').fingerprint() == ours.fingerprint()


def test_vocabulary_file_alone_gives_the_same_tokenizer(vocabulary, tmp_path):
  for name in ('vocab.txt', 'tokenizer_config.json'):
    (tmp_path / name).write_bytes((vocabulary / name).read_bytes())
  ours, again = load_tokenizer(vocabulary), load_tokenizer(tmp_path)
  assert again.encode(TEXTS) == ours.encode(TEXTS)
  assert again.fingerprint() == ours.fingerprint()


def test_stored_padding_and_truncation_are_off(vocabulary, tmp_path):
  backend = tokenizers.Tokenizer.from_file(str(vocabulary / 'tokenizer.json'))
  backend.enable_padding(length=16)
  backend.enable_truncation(8)
  backend.save(str(tmp_path / 'tokenizer.json'))
  again = load_tokenizer(tmp_path)
  texts = ['the cold river runs under a small house near the large tree and falls over', 'a']
  assert again.encode(texts) == load_tokenizer(vocabulary).encode(texts)
  assert len(again.encode(texts)[0]) > 8 and len(again.encode(texts)[1]) == 1
  assert again.fingerprint() == load_tokenizer(vocabulary).fingerprint()


def test_special_tokens_in_text_are_text(vocabulary):
  tokenizer = load_tokenizer(vocabulary)
  special = {tokenizer.cls_id, tokenizer.sep_id, tokenizer.mask_id, tokenizer.pad_id}
  assert not special & set(tokenizer.encode(['a [SEP] [CLS] [MASK] [PAD] b'])[0])


def _folder(path, tokens, lowercase=True, **special):
  path.mkdir()
  backend = tokenizers.Tokenizer(models.WordPiece({t: i for i, t in enumerate(tokens)}, unk_token='[UNK]'))
  backend.normalizer = normalizers.BertNormalizer(lowercase=lowercase)
  backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
  backend.save(str(path / 'tokenizer.json'))
  (path / 'tokenizer_config.json').write_text(json.dumps(special))
  return load_tokenizer(path)


def _altered(vocabulary, folder, config, added=None, only_words=False):
  """A copy of the folder with other settings, and tokens in added_tokens.json."""
  folder.mkdir()
  for name in ('vocab.txt', 'tokenizer.json')[: 1 if only_words else 2]:
    (folder / name).write_bytes((vocabulary / name).read_bytes())
  given = json.loads((vocabulary / 'tokenizer_config.json').read_text()) | config
  (folder / 'tokenizer_config.json').write_text(json.dumps(given))
  if added is not None:
    (folder / 'added_tokens.json').write_text(json.dumps(added))
  return folder


NEW = {
  'content': '[NEW]',
  'special': False,
  'normalized': False,
  'lstrip': False,
  'rstrip': False,
  'single_word': False,
}


@pytest.mark.parametrize(
  ('config', 'added', 'only_words', 'refused'),
  [
    ({}, None, False, ''),
    ({}, {}, True, ''),
    ({}, {'[CLS]': 2, '[MASK]': 4}, True, ''),
    ({'do_lower_case': False}, None, True, ''),
    ({'strip_accents': True}, None, False, ''),
    ({'do_lower_case': False, 'tokenizer_class': 'PreTrainedTokenizerFast'}, None, False, ''),
    ({'do_lower_case': False, 'tokenizer_class': 'ConvBertTokenizer'}, None, False, ''),
    ({'added_tokens_decoder': {}}, {'[NEW]': 120}, True, ''),
    ({'do_lower_case': False}, None, False, 'tokenizer_config.json: do_lower_case is false, but'),
    ({'do_lower_case': False, 'tokenizer_class': 'ElectraTokenizer'}, None, False, 'do_lower_case is false, but'),
    ({'strip_accents': False}, None, False, 'tokenizer_config.json: strip_accents is false, but'),
    ({'tokenize_chinese_chars': False}, None, False, 'tokenizer_config.json: tokenize_chinese_chars is false, but'),
    ({}, {'[NEW]': 120}, True, r"added_tokens.json: the added token '\[NEW\]' is not in tokenizer.json"),
    ({}, {'[NEW]': 120}, False, r"added_tokens.json: the added token '\[NEW\]' is not in tokenizer.json"),
    ({}, {'riv': 120}, True, "added_tokens.json: the added token 'riv' is not in tokenizer.json"),
    ({'added_tokens_decoder': {'120': NEW}}, None, True, r"added_tokens_decoder: the added token '\[NEW\]'"),
  ],
)
def test_settings_that_would_give_other_ids_are_refused(vocabulary, tmp_path, config, added, only_words, refused):
  """Only where transformers obeys them, and what it saves again is read as it reads it.

  Mutations: read tokenizer.json alone; refuse every setting that differs; tokens of added_tokens.json as pieces.
  """
  folder = _altered(vocabulary, tmp_path / 'altered', config, added, only_words)
  theirs = pytest.importorskip('transformers').AutoTokenizer.from_pretrained(str(folder))
  texts = ['The cold RIVER [NEW] runs', 'Café déjà', '日本 42']
  expected = theirs(texts, add_special_tokens=False)['input_ids']
  if refused:
    assert expected != load_tokenizer(vocabulary).encode(texts)
    with pytest.raises(ConfigError, match=refused):
      load_tokenizer(folder)
    theirs.save_pretrained(str(tmp_path / 'again'))
    folder = tmp_path / 'again'
  assert load_tokenizer(folder).encode(texts) == expected


@pytest.mark.parametrize(
  ('name', 'content', 'message'),
  [
    ('tokenizer_config.json', {'do_lower_case': 'yes'}, "do_lower_case 'yes' must be true, false or null"),
    ('tokenizer_config.json', {'added_tokens_decoder': [1]}, 'added_tokens_decoder holds no tokens'),
    ('tokenizer_config.json', {'added_tokens_decoder': {'5': {}}}, 'added_tokens_decoder holds no tokens'),
    ('added_tokens.json', ['x'], 'added_tokens.json: expected a JSON object'),
  ],
)
def test_settings_of_the_wrong_kind(vocabulary, tmp_path, name, content, message):
  folder = _altered(vocabulary, tmp_path / 'altered', {'tokenizer_class': []})
  (folder / name).write_text(json.dumps(content))
  with pytest.raises(ConfigError, match=message):
    load_tokenizer(folder)


def test_fingerprint_tells_tokenizers_apart(tmp_path):
  tokens = [*SPECIAL_TOKENS, 'x', 'y', 'z']
  swapped = [*SPECIAL_TOKENS, 'y', 'x', 'z']
  variants = [
    _folder(tmp_path / 'a', tokens),
    _folder(tmp_path / 'b', swapped),
    _folder(tmp_path / 'c', tokens, lowercase=False),
    _folder(tmp_path / 'd', tokens, mask_token='z'),
    _folder(tmp_path / 'e', [*tokens, 'w']),
  ]
  assert len({t.fingerprint() for t in variants}) == len(variants)
  assert _folder(tmp_path / 'f', tokens).fingerprint() == variants[0].fingerprint()
  assert len(variants[0].fingerprint()) == 64


def test_save_copies_the_files(vocabulary, tmp_path):
  load_tokenizer(vocabulary).save(tmp_path / 'copy')
  for file in vocabulary.iterdir():
    assert (tmp_path / 'copy' / file.name).read_bytes() == file.read_bytes()


def test_missing_and_damaged_files(vocabulary, tmp_path):
  with pytest.raises(ConfigError, match=r'neither tokenizer.json nor vocab.txt.*compactlm tokenizer'):
    load_tokenizer(tmp_path)
  (tmp_path / 'tokenizer.json').write_text('{"version": 1')
  with pytest.raises(ConfigError, match='tokenizer.json: cannot be read'):
    load_tokenizer(tmp_path)
  (tmp_path / 'tokenizer.json').write_bytes((vocabulary / 'tokenizer.json').read_bytes())
  (tmp_path / 'tokenizer_config.json').write_text('[')
  with pytest.raises(ConfigError, match='tokenizer_config.json: not JSON'):
    load_tokenizer(tmp_path)
  (tmp_path / 'tokenizer_config.json').write_text('{"mask_token": "<mask>"}')
  with pytest.raises(ConfigError, match="mask token '<mask>' is not in the vocabulary"):
    load_tokenizer(tmp_path)


def changed(vocabulary, folder, **entries):
  """A copy of the vocabulary whose tokenizer.json has other entries."""
  shutil.copytree(vocabulary, folder)
  content = json.loads((folder / 'tokenizer.json').read_text())
  (folder / 'tokenizer.json').write_text(json.dumps({**content, **entries}))
  return folder


def test_ids_that_the_library_would_change_are_refused(vocabulary, tmp_path):
  """An id used twice, and one beyond a gap, of a model that has no row for what is read. Mutation: trust the file."""
  added = json.loads((vocabulary / 'tokenizer.json').read_text())['added_tokens']
  for number, token in ((5, '!!'), (100_000, '??')):
    folder = changed(
      vocabulary, tmp_path / str(number), added_tokens=[*added, {**added[0], 'id': number, 'content': token}]
    )
    with pytest.raises(
      ConfigError, match=rf"the added token '\{token[0]}\{token[0]}' has id {number}, but .* gives it"
    ):
      load_tokenizer(folder)


def test_names_that_stand_twice_are_refused(vocabulary, tmp_path):
  """The library takes the last. Mutation: let the ValueError of the strict reader through."""
  folder = changed(vocabulary, tmp_path / 't')
  text = (folder / 'tokenizer.json').read_text()
  (folder / 'tokenizer.json').write_text('{"added_tokens": [], ' + text[1:])
  with pytest.raises(ConfigError, match=r'tokenizer\.json: not JSON .*; save the tokenizer again'):
    load_tokenizer(folder)


@pytest.mark.parametrize(
  'entries',
  [
    {'normalizer': {'type': 'Precompiled', 'precompiled_charsmap': 'AAAA'}},
    {'normalizer': {'type': 'Replace', 'pattern': {'Regex': '(a+)+$'}, 'content': 'b'}},
  ],
  ids=['charsmap', 'pattern'],
)
def test_a_panic_of_the_library_is_an_error_like_any_other(vocabulary, tmp_path, entries):
  """It is no Exception. Mutations: `except Exception`; encode by the library's own object."""
  folder = changed(vocabulary, tmp_path / 't', **entries)
  with pytest.raises(ConfigError, match='the tokenizers library gives up on it .*; repair the tokenizer'):
    load_tokenizer(folder).encode(['a' * 64 + '!'])
  with pytest.raises(ConfigError, match='the tokenizers library gives up on it'):
    find_words(['a' * 64 + '!'], load_tokenizer(folder))


def test_training_refuses_nonsense(corpus, vocabulary, tmp_path):
  with pytest.raises(ConfigError, match=r'holds another tokenizer \(tokenizer.json differs\)'):
    train_wordpiece(str(corpus), 60, vocabulary)
  with pytest.raises(ConfigError, match='vocab_size 6 is too small'):
    train_wordpiece(str(corpus), 6, tmp_path / 't')
  (tmp_path / 'empty.txt').write_text('\n \n')
  with pytest.raises(DataError, match='empty.txt: no text'):
    train_wordpiece(str(tmp_path / 'empty.txt'), 100, tmp_path / 't')


@pytest.mark.parametrize('written', range(5))
def test_training_goes_on_after_a_kill(corpus, tmp_path, monkeypatch, written):
  """Between any two files. Mutations: refuse whatever is there; write vocab.txt first."""
  folder, real = tmp_path / 't', wordpiece.write_whole
  train_wordpiece(str(corpus), 120, tmp_path / 'whole', lowercase=False)

  def dying(path, content):
    if len(list(folder.iterdir())) == written:
      raise Kill
    real(path, content)

  with monkeypatch.context() as patch, pytest.raises(Kill) if written < 4 else contextlib.nullcontext():
    patch.setattr(wordpiece, 'write_whole', dying)
    train_wordpiece(str(corpus), 120, folder, lowercase=False)
  assert not (folder / 'vocab.txt').exists() or written == 4  # without it and tokenizer.json nothing reads the folder
  train_wordpiece(str(corpus), 120, folder, lowercase=False)
  assert {p.name: p.read_bytes() for p in folder.iterdir()} == {
    p.name: p.read_bytes() for p in (tmp_path / 'whole').iterdir()
  }


def test_another_tokenizer_is_replaced_when_asked(corpus, vocabulary, tmp_path):
  """Mutation: leave `added_tokens.json` there."""
  folder = changed(vocabulary, tmp_path / 't')
  (folder / 'added_tokens.json').write_text('{"[X]": 7}')
  with pytest.raises(ConfigError, match='added_tokens.json differs'):  # before any text is looked for
    train_wordpiece(str(tmp_path / 'none'), 120, folder)
  train_wordpiece(str(corpus), 120, folder, overwrite=True)
  train_wordpiece(str(corpus), 120, tmp_path / 'fresh')
  assert {p.name: p.read_bytes() for p in folder.iterdir()} == {
    p.name: p.read_bytes() for p in (tmp_path / 'fresh').iterdir()
  }


def test_the_tokenizer_of_a_hub_model_is_that_of_its_download(vocabulary, tmp_path, monkeypatch):
  """Mutation: look for the tokenizer in a folder of the hub's name."""
  import huggingface_hub

  monkeypatch.setattr(huggingface_hub, 'snapshot_download', lambda name, **_: str(vocabulary))
  monkeypatch.chdir(tmp_path)
  assert tokenizer_of('owner/name').fingerprint() == load_tokenizer(vocabulary).fingerprint()
