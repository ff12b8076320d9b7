"""The transport: Flower's Fleet protocol between one server process and its clients.

This folder alone touches Flower's internals, whose minor version is pinned.
"""
