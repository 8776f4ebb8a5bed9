"""Preference data: formats → pairs → tokens → batches, and what was dropped and why."""

from qadapter.data.chat import EndOfTurn, learn_end_of_turn
from qadapter.data.collation import PreferenceCollator
from qadapter.data.encoding import PlainText, Prompt, PromptEncoder, messages_of, prompt_of
from qadapter.data.fingerprints import fingerprint
from qadapter.data.preferences import as_preferences, load_preferences
from qadapter.data.report import DROP_REASONS, NOTES, PreparationReport
from qadapter.data.splits import split_by_prompt, without_prompts
from qadapter.data.streams import PreferenceStream, stream_preferences
from qadapter.data.templates import set_chat_template, use_chat_template
from qadapter.data.texts import read_prompts, read_texts
from qadapter.data.tokenization import TokenizedPreferences, tokenize_preferences
from qadapter.data.vocabulary import check_pairs, check_sequences, padding_id

__all__ = [
    "DROP_REASONS",
    "NOTES",
    "EndOfTurn",
    "PlainText",
    "PreferenceCollator",
    "PreferenceStream",
    "PreparationReport",
    "Prompt",
    "PromptEncoder",
    "TokenizedPreferences",
    "as_preferences",
    "check_pairs",
    "check_sequences",
    "fingerprint",
    "learn_end_of_turn",
    "load_preferences",
    "messages_of",
    "padding_id",
    "prompt_of",
    "read_prompts",
    "read_texts",
    "set_chat_template",
    "split_by_prompt",
    "stream_preferences",
    "tokenize_preferences",
    "use_chat_template",
    "without_prompts",
]
