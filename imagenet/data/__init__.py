"""The data of models, from files to batches. It imports only configurations, and the method for a batch's times.

Read image_sets.py first (`load_data`, and what a data set is), then batches.py (the batch of a step). Behind them:
digits.py, pictures.py (folders of pictures), latents.py and vae.py, and image_files.py for all that is read as pictures
or written as such. noise.py holds the keys of random numbers, provenance.py the record of a model's data.
"""
