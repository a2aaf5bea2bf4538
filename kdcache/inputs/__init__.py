"""Texts, chats and token ids of files and datasets, one item at a time, from any item on."""
