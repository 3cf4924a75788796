"""Use of trained models: load, caption, answer, compare with texts, chat, draw attention maps, save and publish."""
