"""Endpoints that speak OpenAI's API over HTTP/1.1: what all clients that ask one share.

As a load generator needs it: nothing is on the way but what has to be timed.
"""
